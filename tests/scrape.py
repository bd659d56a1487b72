"""Reading metrics as Prometheus does: over HTTP, with a parser of its text format."""

from __future__ import annotations

from urllib.request import urlopen

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """One look at the metrics at `address` ("host:port")."""

    def __init__(self, address: str) -> None:
        with urlopen(f"http://{address}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        self.families: dict[str, Metric] = {m.name: m for m in text_string_to_metric_families(text)}

    @property
    def types(self) -> dict[str, str]:
        """Kinds of metrics by name; when each counter was made is not counted as one."""
        return {
            name: family.type
            for name, family in self.families.items()
            if not name.endswith("_created")
        }

    def total(self, sample: str, **labels: str) -> float:
        """The sum of all samples of this name with at least these labels; 0 without any."""
        return sum(
            found.value
            for family in self.families.values()
            for found in family.samples
            if found.name == sample and labels.items() <= found.labels.items()
        )

    def labels(self, sample: str, label: str) -> set[str]:
        """The values that a label has on the samples of this name."""
        return {
            found.labels[label]
            for family in self.families.values()
            for found in family.samples
            if found.name == sample and label in found.labels
        }
