"""All targets, by name."""

from __future__ import annotations

from fuzz import backup_targets, log_targets, session_targets, store_targets, text_targets
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (log_targets, text_targets, store_targets, session_targets, backup_targets)
    for target in module.targets()
}
