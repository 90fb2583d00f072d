"""All targets, by name."""

from __future__ import annotations

from fuzz import (
    backup_targets,
    follow_targets,
    log_targets,
    service_targets,
    store_targets,
    sync_targets,
    text_targets,
)
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (
        log_targets,
        text_targets,
        store_targets,
        sync_targets,
        follow_targets,
        service_targets,
        backup_targets,
    )
    for target in module.targets()
}
