"""A process that passes messages on and does nothing else: what two hops over loopback cost."""

import sys

import zmq

__all__: list[str] = []


def main(incoming: str, outgoing: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    pull.setsockopt(zmq.RCVHWM, 8)
    push.setsockopt(zmq.SNDHWM, 32)
    pull.connect(incoming)
    push.bind(outgoing)
    zmq.proxy(pull, push)


if __name__ == "__main__":
    main(*sys.argv[1:])
