"""What every part of Understudy must agree on: types, errors, change-log, store, and the sessions' shared parts."""
