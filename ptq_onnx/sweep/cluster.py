"""Ray: started on this machine, or joined. Imported only where a sweep runs."""

from __future__ import annotations

import importlib
import logging
import math
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from ptq_onnx.errors import ConfigError, one_line
from ptq_onnx.files.held_folder import socket_folder
from ptq_onnx.sweep.orphans import named, watched

OBJECTS = 100 << 20
"""Bytes of Ray's object store: cells and rows are small."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ENABLE_METRICS_COLLECTION": "0",
    "RAY_enable_metrics_collection": "0",
}
"""Nothing is reported to anyone, nor printed between our lines."""
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""On those systems Ray's own default, against questions of their firewalls."""
NOWHERE = {
    **dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    ),
    **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
}
"""Ray's head asks known clouds whether they are the machine's, with its usage reports off too; by
these it asks a port of this machine that nobody listens to."""
HERE = "127.0.0.1"
HEAD = "gcs_server"
"""The process of Ray that knows all others."""
SECONDS = 5.0
"""How long a cluster has to answer, and how often its size is asked for."""


def import_ray(*, alone: bool) -> Any:
    """The package, told to keep to itself. ``alone``: it does not ask which address faces outward,
    and with a secret of this process, which it reads when it is loaded, nobody else can talk to
    what it starts.

    Raises ConfigError where it is not installed.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **ON_LOOPBACK}
    if "ray" not in sys.modules:
        for name, value in {**QUIET, **(own if alone else {})}.items():
            os.environ.setdefault(name, value)
    try:
        ray = importlib.import_module("ray")
        # It prints what ends nodes and workers between our lines, which say it too; the name is
        # private: where it is another one, only that silence is lost
        vars(importlib.import_module("ray._private.worker"))["listen_error_messages"] = _listen
        return ray
    except ImportError as error:
        raise ConfigError(
            f"sweep runs on Ray, which cannot be imported ({one_line(error)}): pip install"
            " 'ray==2.60.*', or install ptq-onnx with its extra [ray]."
        ) from error


@dataclass(frozen=True)
class Cluster:
    """Ray, as a package that is connected. ``single``: this machine is all of it. ``ended``: says
    whether its head is gone, for which Ray itself waits long; ``cores``: how many it has, which may
    change."""

    ray: Any
    single: bool
    ended: Callable[[], bool]
    cores: Callable[[], float]


@contextmanager
def started(
    cores: int, memory: int, environment: Mapping[str, str], gpus: int = 0
) -> Iterator[Cluster]:
    """Ray on this machine with so much to give out, seen by this user's processes alone, without
    a dashboard; all of it is gone afterwards. ``environment``: variables of the workers.

    Raises ConfigError.
    """
    ray = import_ray(alone=True)
    with ExitStack() as stack:
        folder = stack.enter_context(socket_folder("ray"))
        stack.enter_context(_set({"TMPDIR": str(folder), **NOWHERE, **environment}))
        mark = stack.enter_context(watched(folder))
        try:
            ray.init(
                num_cpus=cores,
                num_gpus=gpus,
                _memory=memory,
                object_store_memory=OBJECTS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=str(folder),
                _node_ip_address=HERE,
            )
        except Exception as error:  # of its own and of the system's, without a common base
            raise ConfigError(f"Ray cannot be started here: {one_line(error)}.") from error
        stack.callback(ray.shutdown)
        heads = named(mark, HEAD)
        yield Cluster(
            ray, True, lambda: bool(heads) and not heads & named(mark, HEAD), lambda: cores
        )


@contextmanager
def joined(address: str, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """A cluster that runs already, as ``ray.init`` takes its address. Raises ConfigError."""
    ray = import_ray(alone=False)
    _reach(address)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": {**QUIET, **environment}},
        )
    except Exception as error:  # as above
        raise ConfigError(f"--address {address}: no cluster to join: {one_line(error)}.") from error
    try:
        yield Cluster(ray, False, lambda: False, _counted(ray))
    finally:
        ray.shutdown()


def _counted(ray: Any) -> Callable[[], float]:
    """The cores of a cluster, asked for every few seconds."""
    asked, found = -math.inf, 0.0

    def cores() -> float:
        nonlocal asked, found
        if time.monotonic() - asked >= SECONDS:
            asked, found = time.monotonic(), float(ray.cluster_resources().get("CPU", 0))
        return found

    return cores


def _listen(*_: Any) -> None:
    """Nothing is printed."""


def _reach(address: str) -> None:
    """Refuse at once where nobody listens: Ray tries for long. Raises ConfigError."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        if address == "auto":
            return
        raise ConfigError(f"--address {address}: expected HOST:PORT, as in 10.0.0.1:6379.")
    try:
        socket.create_connection((host, int(port)), SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--address {address}: nobody answers there ({error}).") from error


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for what is started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
