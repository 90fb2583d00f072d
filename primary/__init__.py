"""Runs in or beside the server: commits transactions, ships them to replicas, serves clients.

:class:`Primary` is a primary inside an application.
"""

from understudy.primary.embedded import Primary

__all__ = ["Primary"]
