"""A Hub on this machine, which the real clients talk to over HTTP: no mock of them is needed.

with LoopbackHub(folder) as hub:
    token = hub.add_user("ada", orgs={"acme": "write"})
    HfApi(endpoint=hub.url, token=token).create_repo("acme/model")
    hub.fault(method="PUT", status=500)      # the next upload fails once
    hub.requests                             # all that was sent
"""

from .server import Fault, LoopbackHub, Recorded

__all__ = ["Fault", "LoopbackHub", "Recorded"]
