"""What the connector makes of messages in an order that no detector should send them in."""

from typing import Any

import pytest
import zmq

from streaming.connectors.eiger import EigerConnector
from streaming.retrieval import open_run

from .harness import ANY_PORT, arm, blob, detector, serving, wait_for


class Captured:
    """The messages of one series: its start, two images, its end."""

    def __init__(self, user_data: Any = None) -> None:
        pull: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        pull.setsockopt(zmq.RCVTIMEO, 10_000)
        with detector() as sender:
            pull.connect(sender.endpoint)
            arm(sender, 2)
            sender.send_image(0, blob(0), user_data)
            sender.send_image(1, blob(1))
            sender.send_end()
            self.start, self.first, self.second, self.end = (pull.recv_multipart(copy=False) for _ in range(4))
        pull.close()


def told(connector: EigerConnector, *messages: Any) -> None:
    for message in messages:
        connector._receive(message)


def test_images_before_their_start_message_cost_no_more_than_themselves(tmp_path):
    """The service was started in the middle of a series, and the detector says once more what it is about."""
    series = Captured()
    with serving(tmp_path) as service:
        connector = EigerConnector(service.recorder, "eiger", ANY_PORT, "lyso")
        told(connector, series.first, series.first, series.start, series.first, series.second, series.end)
        assert connector.n_bad_messages == 2
        stream = open_run("lyso/1", service=service.address)["eiger"]
        wait_for(lambda: stream.ledger().is_terminal)
        assert stream.ledger().stored == 2


def test_series_that_is_counted_alike_is_another_one(tmp_path):
    """A trailing image of a series that has ended belongs to nothing, and hides nothing."""
    series = Captured()
    with serving(tmp_path) as service:
        connector = EigerConnector(service.recorder, "eiger", ANY_PORT, "lyso")
        told(connector, series.start, series.first, series.second, series.end)
        wait_for(lambda: open_run("lyso/1", service=service.address)["eiger"].ledger().is_terminal)
        told(connector, series.second, series.start, series.first, series.second, series.end)
        stream = open_run("lyso/2", service=service.address)["eiger"]
        wait_for(lambda: stream.ledger().is_terminal)
        assert stream.ledger().stored == 2


@pytest.mark.parametrize("user_data", [{"note": "x" * (5 << 20)}], ids=["5 MB"])
def test_frame_with_an_unusable_appendix_is_rejected_by_its_index(tmp_path, user_data):
    series = Captured(user_data)
    with serving(tmp_path) as service:
        connector = EigerConnector(service.recorder, "eiger", ANY_PORT, "lyso")
        told(connector, series.start, series.first, series.second, series.end)
        stream = open_run("lyso/1", service=service.address)["eiger"]
        wait_for(lambda: stream.ledger().is_terminal)
        (gap,) = stream.ledger().ranges
        assert (gap.start, gap.stop, gap.state) == (0, 1, "rejected")
        assert "larger than" in gap.cause
