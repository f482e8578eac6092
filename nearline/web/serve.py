"""Running the HTTP application: where it may listen, and until when."""

import os
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from nearline.web.app import create_app
from nearline.web.child import end_with_parent
from nearline.web.service_view import ServiceView
from storage.errors import AccessDenied, ServiceUnavailable, SourceBusy
from streaming.security import check_bind, is_loopback

__all__ = ["WebSettings", "serve_web"]


@dataclass(frozen=True, slots=True)
class WebSettings:
    """What `nearline web` can be told."""

    service: str
    host: str = "127.0.0.1"
    port: int = 8600
    certificate: Path | None = None
    certificate_key: Path | None = None
    is_insecure_allowed: bool = False
    ends_with_parent: bool = False


def serve_web(settings: WebSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises
    ------
    SourceBusy : the port is in use, or beyond loopback without tokens and TLS.
    """
    # Nobody gets further through this process than with a token of their own: it shows none that its
    # user may have, neither from the environment nor from the file.
    os.environ["NEARLINE_TOKEN"] = ""
    view = ServiceView(settings.service)
    bind = f"tcp://{settings.host}:{settings.port}"
    is_local = is_loopback(bind)
    if not is_local:
        check_bind(bind, _wants_tokens(view), settings.certificate is not None, settings.is_insecure_allowed)
    if settings.ends_with_parent:
        end_with_parent()
    app = create_app(view) if is_local else create_app(view, allowed_hosts=("*",))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.certificate_key,
        log_config=None,
        access_log=False,
        server_header=False,
        # A crowd of slow readers cannot pile up here.
        limit_concurrency=256,
        timeout_keep_alive=15,
    )
    server = uvicorn.Server(config)
    try:
        server.run()
    except SystemExit:  # uvicorn's way of saying that it could not listen; it has logged why
        raise SourceBusy(
            f"cannot serve HTTP on {settings.host}:{settings.port}; another program may be listening there, "
            "choose another port with --port"
        ) from None


def _wants_tokens(view: ServiceView) -> bool:
    try:
        view.status(None)
    except AccessDenied:
        return True
    except ServiceUnavailable:
        return False
    return False
