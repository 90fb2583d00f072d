"""Real crashes: nodes are killed, lose power, get a bad network and bad disks, and what clients were told must hold.

`make test` gives each test a few seconds; `make crash SECONDS=600` lets each go on for longer, and says what it did.
"""
