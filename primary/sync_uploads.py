"""What a client uploads to a realm, in its order: nothing overtakes what was refused. Pure."""

from __future__ import annotations

from understudy.common.errors import ReceiptExpired, Unavailable, UnderstudyError
from understudy.primary.sync_host import Host
from understudy.v1 import data_pb2


class Uploads:
    """To one binding's realm."""

    def __init__(self) -> None:
        self._refused: dict[bytes, int] = {}  # by client, the first number that was refused

    def submit(self, host: Host, client: bytes, transaction: data_pb2.Transaction) -> None:
        """Hands a transaction to the server.

        Raises:
            Unavailable: one before it was refused, and has not come again.
            UnderstudyError: it is refused itself.
        """
        path, number = transaction.realm, transaction.number
        first = self._refused.get(client, number)
        # Unless it has come in meanwhile in another way: home from somebody who held it, or from a copied directory.
        if number > first > host.state.last_number(path, client):
            # Were it taken now, the one before it never could be: numbers rise.
            raise Unavailable(
                f"transaction {number} on {path} comes behind {first}, which was refused",
                remedy="send them again, in order",
            )
        try:
            host.submit(client, transaction)
        except ReceiptExpired:  # it is here, and won't be sent again: nobody has to wait for it
            self._refused.pop(client, None)
            raise
        except UnderstudyError:
            self._refused[client] = number
            raise
        self._refused.pop(client, None)
