"""Understudy and its peers, side by side: the same work on each system that is installed, in turn within one run.

One module a system (``ours``, ``postgresql``, ``redis``, ``etcd``), all behind the interface in ``system``; one
function a row of the comparison in ``rows``. Run by ``make bench-peers``.
"""
