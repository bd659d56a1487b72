"""The address of a machine with several of them."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from types import SimpleNamespace

import psutil
import pytest

from homer.errors import ConfigError
from workers.addresses import address_toward, find_address, join_port


@pytest.fixture(autouse=True)
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a slow network, a fast one of both families, and an empty interface."""

    def entry(address: str) -> SimpleNamespace:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return SimpleNamespace(family=family, address=address)

    names: Mapping[str, list[str]] = {
        "lo": ["127.0.0.1", "::1"],
        "eth0": ["192.0.2.7", "fe80::1%eth0"],
        "eth1": ["fd00::7", "10.1.0.7", "10.1.0.8"],
        "eth2": [],
    }
    found = {name: [entry(a) for a in addresses] for name, addresses in names.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.1.0.0/16", "10.1.0.7"),
        ("fd00::/8", "fd00::7"),
        ("eth0", "192.0.2.7"),
        ("eth1", "10.1.0.7"),
        ("192.0.2.7", "192.0.2.7"),
        ("0.0.0.0", "0.0.0.0"),
        ("worker.example", "worker.example"),
    ],
)
def test_networks_and_interfaces_mean_this_machines_address(host: str, address: str) -> None:
    assert find_address(host) == address


def test_no_address_there_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no address in 10\.9\.0\.0/16; it has .*eth0: 192"):
        find_address("10.9.0.0/16")
    with pytest.raises(ConfigError, match="no address in eth2"):
        find_address("eth2")
    with pytest.raises(ConfigError, match="is no network"):
        find_address("10.1.0.0/99")


def test_the_route_decides_toward_a_peer() -> None:
    assert address_toward("127.0.0.1") == "127.0.0.1"
    assert address_toward("127.8.9.10") == "127.0.0.1"
    with pytest.raises(ConfigError, match="no route from this machine"):
        address_toward("host.invalid")


def test_ports_behind_addresses_of_both_families() -> None:
    assert join_port("10.1.0.7", 5) == "10.1.0.7:5"
    assert join_port("fd00::7", 5) == "[fd00::7]:5"
