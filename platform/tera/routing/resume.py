"""Going on at another replica, past Serve."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from tera.generation import Abort, Generation, Resume
from tera.routing.channel import Inbox, TokenReceiver
from tera.routing.switchboard import Route, Switchboard


async def resume(
    switchboard: Switchboard,
    receiver: TokenReceiver,
    generation: Generation,
    inbox: Inbox,
    route: Route,
    counted: Callable[[str], AbstractContextManager[None]],
) -> bool:
    """Send a generation to a connected replica over the token channel; see `ModelHandle.resume`.

    A replica's death moves all that it ran in one moment, and a call through Serve costs a
    millisecond of CPU each. Serve sees nothing of what goes on so: `counted` has it counted at the
    replica of that id while its block runs, and the replica waits for it when it drains.
    """
    replica_id = await switchboard.take(route)
    try:
        if not receiver.order(replica_id, Resume(generation)):
            return False
        with counted(replica_id):
            route.offered(replica_id)
            await inbox.ended()
    finally:
        if not inbox.finished:
            receiver.order(replica_id, Abort(generation.generation_id))
        switchboard.release(replica_id)
    return True
