"""The Ray side: worker pool, coordinator, scheduler, doors, client and the `homer` command."""

from __future__ import annotations
