"""HTTP beside a service: health, metrics and runs, from a process of its own that speaks only the native wire.

`create_app` is the FastAPI application, `WebChild` keeps a process with it running beside a service.
"""

from nearline.web.app import create_app
from nearline.web.child import WebChild

__all__ = ["WebChild", "create_app"]
