"""Which address of this machine others reach, where it has several.

Knows nothing about what listens there.
"""

from __future__ import annotations

import ipaddress
import re
import socket

import psutil

from homer.errors import ConfigError, PromptError

_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")


def find_address(host: str) -> str:
    """The address that `host` means on this machine.

    Parameters
    ----------
    host : str
        A network ("10.1.0.0/16"), an interface ("eth1"): this machine's address in it, of several
        the first, IPv4 before IPv6. Anything else is an address or a name already.

    Raises
    ------
    ConfigError
        When this machine has no address there.
    """
    interfaces = _interfaces()
    if "/" in host:
        try:
            network = ipaddress.ip_network(host, strict=False)
        except ValueError as error:
            raise ConfigError(f"{host!r} is no network; write it like 10.1.0.0/16") from error
        everything = [address for addresses in interfaces.values() for address in addresses]
        found = [address for address in everything if ipaddress.ip_address(address) in network]
    elif host in interfaces:
        found = interfaces[host]
    else:
        return host
    if not found:
        have = "; ".join(f"{name}: {', '.join(own)}" for name, own in interfaces.items() if own)
        raise ConfigError(f"this machine has no address in {host}; it has {have}")
    return found[0]


def address_toward(peer: str) -> str:
    """The address from which this machine sends to `peer`, an address or a host's name.

    Asks the system's routes; nothing is sent.

    Raises
    ------
    ConfigError
        When there is no route.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(f"no route from this machine to {peer}: {error}") from error


def check_address(address: str) -> str:
    """ "host:port", as it is.

    gRPC would take more than that for an address, down to files of this machine.

    Raises
    ------
    PromptError
        When it is something else.
    """
    if not _HOST_PORT.fullmatch(address):
        raise PromptError(f"{address!r} is no address of a worker; write host:port")
    return address


def join_port(host: str, port: int) -> str:
    """ "host:port", with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _interfaces() -> dict[str, list[str]]:
    """Addresses by interface, IPv4 first; without those that are valid on one link alone."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [
            address.address
            for family in families
            for address in addresses
            if address.family == family and "%" not in address.address
        ]
        for name, addresses in psutil.net_if_addrs().items()
    }
