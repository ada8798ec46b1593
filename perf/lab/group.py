"""What is measured together: one layout, rule and storage, by every implementation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lab.device import Device
from lab.embedding_tables import Tables
from lab.embeddings import Embeddings
from lab.rules import ALL_STORAGES, EMBEDDING_RULES, RULES, STORAGES, Rule, Storage
from lab.suites import Layout
from lab.workload import Workload


class Group(NamedTuple):
    """What is measured together."""

    suite: str
    layout: Layout | Tables
    rule: Rule
    storage: Storage

    @property
    def name(self) -> str:
        return f"{self.layout.name}, {self.rule.name}, {self.storage.name}"

    @property
    def workload(self) -> Any:
        """The class of its tensors."""
        return Embeddings if isinstance(self.layout, Tables) else Workload

    def columns(self) -> dict[str, Any]:
        """What its rows have in common."""
        return {
            "suite": self.suite,
            "layout": self.layout.name,
            "tensors": len(self.layout.tensors),
            "params": self.layout.params,
            "rule": self.rule.name,
            "storage": self.storage.name,
            **self.layout.columns(self.rule, self.storage),
        }

    def made(self, device: Device) -> Any:
        """Its tensors, if they fit the memory."""
        if self.layout.size(self.rule, self.storage) > device.free_bytes():
            return None
        try:
            return self.workload(*self[1:], device.type)
        except torch.OutOfMemoryError:
            return None


def groups_of(suite: str, layout: Layout | Tables) -> Iterator[Group]:
    """All rules and storages of a layout."""
    if isinstance(layout, Tables):
        yield from (Group(suite, layout, rule, STORAGES[0]) for rule in EMBEDDING_RULES)
        return
    for storage in ALL_STORAGES.values():
        for rule in RULES:
            if rule.states or storage in STORAGES[:2]:  # without state, some are one
                yield Group(suite, layout, rule, storage)
