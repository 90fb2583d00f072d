"""Mutants of what clients rely on."""

from __future__ import annotations

from mutants.mutant import Mutant

MUTANTS = (
    # -- exactly once ----------------------------------------------------------------------------------------------
    Mutant(
        name="the last number is taken for a new one",
        guarantee="G6",
        file="primary/committer.py",
        old="        elif number > self._applier.state.last_number(path, client):",
        new="        elif number >= self._applier.state.last_number(path, client):",
        tests=("tests/test_committer.py",),
    ),
    Mutant(
        name="a retry in flight is not known",
        guarantee="G6",
        file="primary/committer.py",
        old="            known = in_flight.get(number)\n",
        new="            known = None\n",
        tests=("tests/test_committer.py",),
    ),
    Mutant(
        name="receipts are not kept",
        guarantee="G6",
        file="common/memtable.py",
        old="        versions[number] = version\n",
        new="",
        tests=("tests/test_committer.py",),
    ),
    Mutant(
        name="a retry after a restart is not known",
        guarantee="G6",
        file="common/memtable.py",
        old="        first.client_rows.add(number=number, version=version, time_us=time_us)",
        new="        first.client_rows.add(number=0, version=version, time_us=time_us)",
        tests=("tests/test_state.py::test_g6_a_client_s_last_number_is_known_from_the_store",),
    ),
    Mutant(
        name="a client is another one after it reconnects",
        guarantee="G6",
        file="client/peers.py",
        old="        bind = data_pb2.Bind(client=self._client)",
        new="        bind = data_pb2.Bind(client=new_id())",
        tests=("tests/test_client.py::test_transactions_keep_their_numbers_over_connections",),
    ),
    Mutant(
        name="what is sent again gets new numbers",
        guarantee="G6",
        file="client/stream.py",
        old="        self._unsent = deque(self._unanswered.values())  # in order of their numbers\n",
        new="        self._unanswered = {next(self._numbers): one for one in self._unanswered.values()}\n"
        "        for number, one in self._unanswered.items():\n"
        "            one.message.number = number\n"
        "        self._unsent = deque(self._unanswered.values())\n",
        tests=("tests/test_client.py::test_transactions_keep_their_numbers_over_connections",),
    ),
    Mutant(
        name="a renewed change is applied again under its own name",
        guarantee="G6",
        file="primary/committer.py",
        old="        if not self._renews or not self.was_renewed(path, client, number):",
        new="        if True:",
        tests=("tests/test_committer.py", "tests/test_homecoming.py"),
    ),
    Mutant(
        name="a change that came home is renewed once more",
        guarantee="G6",
        file="primary/homecoming.py",
        old="        return receipt is not None or self._taker.was_renewed(self._path, change.client, change.number)",
        new="        return False",
        tests=("tests/test_homecoming.py",),
    ),
    Mutant(
        name="a queue lets go of what is not confirmed",
        guarantee="G6",
        file="client/local_queue.py",
        old="            if change.number <= last_numbers.get(change.client, 0)",
        new="            if change.number <= last_numbers.get(change.client, 0) + 1",
        tests=("tests/test_local_loading.py", "tests/test_sync_session.py"),
    ),
    Mutant(
        name="a change that is refused for now leaves the queue",
        guarantee="G6",
        file="client/uploading.py",
        old="            if isinstance(error, ReceiptExpired):",
        new="            if isinstance(error, (ReceiptExpired, Unavailable)):",
        tests=("tests/test_sync_session.py",),
    ),
    # -- whose history ---------------------------------------------------------------------------------------------
    Mutant(
        name="a client follows an earlier reign than it has met",
        guarantee="G7",
        file="client/peers.py",
        old="        if claim.epoch < self._met.epoch:",
        new="        if False:",
        tests=(
            "tests/test_client.py::test_g7_a_server_of_an_earlier_epoch_than_was_met_gets_no_transaction",
        ),
    ),
    Mutant(
        name="a row of the sync table streams to a fork",
        guarantee="G3",
        file="common/sync_table.py",
        old="    Row(decision=RESET, reason=Reason.OTHER_HISTORY, relation=Relation.FORKED),",
        new="    Row(decision=STREAM, relation=Relation.FORKED),",
        tests=("tests/test_sync_table.py",),
    ),
    Mutant(
        name="a row of the reset table tries recovery again",
        guarantee="G9",
        file="client/reset_table.py",
        old='    ("recover", "recover"): (Refusal.RECOVERED, Refusal.RECOVERED),',
        new='    ("recover", "recover"): (Attempt.RECOVER, Refusal.RECOVERED),',
        tests=("tests/test_reset_table.py",),
    ),
    Mutant(
        name="received changes are not checked against the copy's chain",
        guarantee="G3",
        file="client/local_changes.py",
        old="        if change.version != version or change.previous != head or change.realm != copy.path:",
        new="        if change.version != version or change.realm != copy.path:",
        tests=("tests/test_local_store.py", "tests/test_local_loading.py"),
    ),
    Mutant(
        name="a tail's HMAC is not checked",
        guarantee="G10",
        file="primary/homecoming.py",
        old="        if not hmac.compare_digest(entries.sign(history_key, digest), mac):",
        new="        if False:",
        tests=("tests/test_homecoming.py",),
        simulated=False,
    ),
    # -- seen means safe -------------------------------------------------------------------------------------------
    Mutant(
        name="sent to clients before it is safe",
        guarantee="G5",
        file="primary/sync_session.py",
        old="        sent = [row for row in rows if row.lsn <= shown and row.version <= upto]",
        new="        sent = [row for row in rows if row.version <= upto]",
        tests=("tests/test_sync_host_session.py",),
    ),
    Mutant(
        name="after a restart all is shown that is here",
        guarantee="G5",
        file="primary/committer.py",
        old="        return self._reached(min(self._policy.durability, Durability.REPLICA))",
        new="        return self.committed_lsn",
        tests=(
            "tests/test_committer.py",
            "tests/test_sync_sim.py::test_g5_a_failover_to_a_replica_that_has_caught_up_is_no_matter_to_clients",
            "tests/test_sync_sim.py::test_g5_nothing_is_shown_again_before_it_is_safe_again",
        ),
    ),
    Mutant(
        name="a tail is let go before it is safe",
        guarantee="G5",
        file="primary/committer.py",
        old="        return min(self._replica_durable, self.committed_lsn)",
        new="        return self.committed_lsn",
        tests=(
            "tests/test_committer.py",
            "tests/test_sync_sim.py::test_g5_a_failover_to_a_replica_that_has_caught_up_is_no_matter_to_clients",
            "tests/test_sync_sim.py::test_g5_nothing_is_shown_again_before_it_is_safe_again",
        ),
    ),
    # -- fail closed -----------------------------------------------------------------------------------------------
    Mutant(
        name="whoever may read may drop",
        guarantee="G10",
        file="primary/data_service.py",
        old="            path = self._authority.permitted(caller(), request.realm, Level.MANAGE)",
        new="            path = self._authority.permitted(caller(), request.realm, Level.READ)",
        tests=("tests/test_accounts.py::test_g10_permissions_are_what_users_can_do",),
        simulated=False,
    ),
    Mutant(
        name="a call in the table requires less",
        guarantee="G10",
        file="common/access.py",
        old='    "/understudy.v1.Admin/Fence": Requires.ADMIN,',
        new='    "/understudy.v1.Admin/Fence": Requires.ANY,',
        tests=("tests/test_access.py",),
        simulated=False,
    ),
    Mutant(
        name="with accounts and no TLS nothing is asked for",
        guarantee="G10",
        file="common/access.py",
        old="    if tls or accounts:",
        new="    if tls:",
        tests=("tests/test_access.py",),
        simulated=False,
    ),
)
