"""Several processes as one run: how they find each other, agree, and notice when one of them is gone.

JAX's distributed runtime connects them. What only process 0 does (the folder of the run, checkpoints, words for a
person) goes through `from_first`, and what may fail in any of them (reading a config and its data) through
`together`, so that all go on or all leave for the same reason. A collective waits for ever for a process that is
gone; therefore each keeps a connection to process 0 that breaks with it, and whoever sees one break says whose it
was and ends at once. With one process everything here is a plain call.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the coordinator's address and its key-value store have no public name
from jax.experimental import multihost_utils

from efficientnet.errors import MISTAKES, ConfigError, RunError, status

T = TypeVar('T')

# Variables in which launchers tell a process its number and how many there are: torchrun and its like, Open MPI,
# SLURM (inside a step; its batch script has the numbers too, but runs alone), MPICH and Intel MPI.
LAUNCHERS = (
    ('RANK', 'WORLD_SIZE'),
    ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
    ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_STEP_NODELIST'),
    ('PMI_RANK', 'PMI_SIZE'),
)
MASTER_PORT = '29500'  # where MASTER_ADDR comes without MASTER_PORT
# Variables from which JAX finds out itself what is missing: in SLURM, Open MPI up to version 4, an indexed
# Kubernetes Job or a JobSet.
DETECTED = (
    ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST'),
    ('OMPI_MCA_orte_hnp_uri',),
    ('KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'),
)
GOODBYE = -1
MEETING = 'efficientnet/watch'  # key of the port and the token for it
PATIENCE = 60  # seconds that a process waits for the connection of another that is there
GREETING = 5  # seconds that one who has connected may take to say who it is
LOST = 3  # exit status of a process that leaves because another is gone
KEEPALIVE = {'TCP_KEEPIDLE': 15, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 3}  # seconds, seconds, times


@dataclasses.dataclass(frozen=True)
class Membership:
    """What a process knows of the run it belongs to before it has met the others; JAX finds out what is None.

    Attributes:
        coordinator: 'host:port' where process 0 listens.
        process_id: 0 … process_count − 1.
        process_count: Of the run.
    """

    coordinator: str | None = None
    process_id: int | None = None
    process_count: int | None = None


def find_membership(given: Membership, cluster: str, environ: Mapping[str, str] = os.environ) -> Membership | None:
    """Finds out which run of several processes this one belongs to.

    Args:
        given: What the user said.
        cluster: 'auto' fills in what a launcher says in the environment, 'jax' leaves all of that to JAX (which
            knows Cloud TPUs too), 'none' takes only what is given.
        environ: The environment.

    Returns:
        None if this process is a run of its own.

    Raises:
        ConfigError: A number is missing or impossible.
    """
    if cluster == 'jax':
        return _checked(given)
    known, detected = given, False
    if cluster == 'auto':
        known = _fill_in(given, environ)
        detected = any(all(name in environ for name in names) for names in DETECTED)
    if given == Membership() and (known.process_count == 1 or (known == given and not detected)):
        return None
    values = dataclasses.asdict(known)
    missing = [f'--{name}' for name, value in values.items() if value is None]
    if missing and not detected:
        present = ', '.join(f'{name}={value}' for name, value in values.items() if value is not None)
        raise ConfigError(
            f'{present} without {" and ".join(missing)}: several processes need all three, --coordinator=HOST:PORT '
            'being on the host of process 0; --cluster=none makes each a run of its own'
        )
    return _checked(known)


def _fill_in(given: Membership, environ: Mapping[str, str]) -> Membership:
    names = next((names for names in LAUNCHERS if all(name in environ for name in names)), None)
    if names is None:
        return given
    found = [environ[name] for name in names[:2]]
    if not all(value.isdigit() for value in found):
        raise ConfigError(f'{names[0]}={found[0]!r} and {names[1]}={found[1]!r} in the environment must be numbers')
    coordinator = given.coordinator
    if coordinator is None and 'MASTER_ADDR' in environ:
        coordinator = f'{environ["MASTER_ADDR"]}:{environ.get("MASTER_PORT", MASTER_PORT)}'
    process_id, count = map(int, found)
    return Membership(
        coordinator,
        process_id if given.process_id is None else given.process_id,
        count if given.process_count is None else given.process_count,
    )


def _checked(member: Membership) -> Membership:
    """Raises ConfigError for numbers that cannot be."""
    host, _, port = (member.coordinator or 'host:1').rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f'--coordinator={member.coordinator!r} must be HOST:PORT, the same for all processes')
    if member.process_count is not None and member.process_count < 1:
        raise ConfigError(f'--process_count={member.process_count} must be at least 1')
    if None not in (member.process_id, member.process_count) and not 0 <= member.process_id < member.process_count:
        raise ConfigError(
            f'--process_id={member.process_id} must be from 0 to {member.process_count - 1}, another for each process'
        )
    return member


@contextlib.contextmanager
def connected(member: Membership | None) -> Iterator[None]:
    """Meets the other processes of a run, and parts from them at the end.

    An error that all agree on (see `agreed`) goes on to the caller. Any other is this process's alone: it is printed
    with the process's number and ends the process at once, upon which the others leave too.

    Args:
        member: From `find_membership`; None does nothing.

    Raises:
        RunError: The others did not come.
    """
    if member is None:
        yield
        return
    watch = _join(member)
    try:
        _check_devices()
        yield
    except BaseException as error:
        if not getattr(error, 'agreed', False):
            _leave_alone(error, watch)
        watch.part()
        raise
    watch.part()


def first() -> bool:
    """Tells whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def agreed(error: Exception) -> Exception:
    """Marks an error that every process raises at the same place, and returns it."""
    error.agreed = True
    return error


def from_first(work: Callable[[], T]) -> T:
    """Does something in process 0 alone; every process gets what it returned.

    Args:
        work: Its value goes to the other processes pickled.

    Raises:
        ConfigError, DataError, RunError: Process 0 raised it; in all processes.
    """
    if jax.process_count() == 1:
        return work()
    outcome = _try(work) if first() else None
    said = _broadcast(outcome, 0)
    return _unwrap(outcome if first() else said)


def together(work: Callable[[], T]) -> T:
    """Does something in every process; each gets its own value if all succeed.

    Raises:
        ConfigError, DataError, RunError: A process raised it; in all processes.
    """
    if jax.process_count() == 1:
        return work()
    value, error = _try(work)
    failed = np.ravel(multihost_utils.process_allgather(np.int32(error is not None)))
    if failed.any():
        value, error = _broadcast((None, error), int(failed.argmax()))
    return _unwrap((value, error))


def require_same(values: Mapping[str, Any]) -> None:
    """Checks that all processes hold the same values.

    Args:
        values: By name, for a person.

    Raises:
        ConfigError: A process has others than process 0; in all processes.
    """
    if jax.process_count() == 1:
        return
    expected = from_first(lambda: dict(values))

    def check() -> None:
        absent = object()
        names = sorted(
            name for name in expected.keys() | values.keys() if expected.get(name, absent) != values.get(name, absent)
        )
        if names:
            changes = ', '.join(f'{name}={values.get(name)!r}, not {expected.get(name)!r}' for name in names)
            raise ConfigError(f'process {jax.process_index()} has {changes}, as process 0 has; start all of them alike')

    together(check)


def _try(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except MISTAKES as error:
        return None, error


def _unwrap(outcome: tuple[T, Exception | None]) -> T:
    value, error = outcome
    if error is not None:
        raise agreed(error)
    return value


def _broadcast(value: Any, source: int) -> Any:
    """Sends a pickled value from one process to all."""
    sends = jax.process_index() == source
    data = np.frombuffer(pickle.dumps(value), np.uint8) if sends else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(data.size), is_source=sends))
    # Few sizes, because each is a program of its own.
    room = 1 << max(size - 1, 0).bit_length() if size < 2**20 else -(-size // 2**20) * 2**20
    padded = np.zeros(room, np.uint8)
    padded[: data.size] = data
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded, is_source=sends))
    return value if sends else pickle.loads(received[:size].tobytes())


def _join(member: Membership) -> 'Watch':
    # Its SIGTERM handler would take the place of ours, which saves and leaves.
    jax.config.update('jax_enable_preemption_service', False)
    if member.process_id in (None, 0):
        print('waiting for the other processes …', flush=True)
    detection = 'deactivate' if None not in dataclasses.astuple(member) else None
    try:
        jax.distributed.initialize(
            member.coordinator, member.process_count, member.process_id, cluster_detection_method=detection
        )
        return Watch()
    except (RuntimeError, ValueError, OSError) as error:
        said = next(iter(str(error).splitlines()), '')
        raise RunError(f'the processes of this run could not meet ({member}): {said}') from error


def _check_devices() -> None:
    owners = [device.process_index for device in jax.devices()]
    counts = [owners.count(process) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise agreed(ConfigError(f'the processes have {counts} devices; start each with the same number'))
    try:
        multihost_utils.sync_global_devices('devices')
    except (RuntimeError, ValueError) as error:
        said = next(iter(str(error).splitlines()), '')
        raise RunError(
            f'the devices of this process cannot reach those of the others: {said}; between CPUs, the own name of each '
            'host must lead to an address that the others reach'
        ) from error


def _leave_alone(error: BaseException, watch: 'Watch') -> NoReturn:
    """Ends this process in the middle of everything, and tells the others."""
    watch.wait_if_leaving()
    name = f'process {watch.own}'
    number = getattr(error, 'number', None)  # of a signal
    if isinstance(error, KeyboardInterrupt):
        text, code = 'SIGINT', 128 + signal.SIGINT
    elif number is not None:
        text, code = str(error), 128 + number
    elif isinstance(error, MISTAKES):
        text, code = f'error: {" ".join(str(error).split())}', status(error)
    else:
        text, code = ''.join(traceback.format_exception(error)), 1
    print(f'{name}: {text}', file=sys.stderr, flush=True)
    watch.leave(watch.own, code)


class Watch:
    """Connections between process 0 and every other process, which break when one of their ends does.

    Over each, either side says the number of a process that is gone, or at last goodbye.

    Attributes:
        own: Number of this process.
    """

    def __init__(self) -> None:
        joined = distributed.global_state
        host = joined.coordinator_address.rpartition(':')[0].strip('[]')
        self.own, self._count = joined.process_id, joined.num_processes
        self._leaving = False
        self._hosts = {0: host}
        self._peers: dict[int, socket.socket] = {}
        if self.own == 0:
            with _listen() as server:
                token = secrets.token_hex(16)
                joined.client.key_value_set(MEETING, json.dumps([server.getsockname()[1], token]))
                self._accept(server, token)
        else:
            port, token = json.loads(joined.client.blocking_key_value_get(MEETING, 1000 * PATIENCE))
            self._peers[0] = socket.create_connection((host, port), timeout=PATIENCE)
            hello = {'token': token, 'process': self.own, 'host': socket.gethostname()}
            self._peers[0].sendall(json.dumps(hello).encode() + b'\n')
        for peer in self._peers.values():
            _keep_alive(peer)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def leave(self, gone: int, status: int) -> NoReturn:
        """Tells the others which process is gone and ends this one."""
        self._leaving = True
        self._tell(gone)
        sys.stdout.flush()
        if self.own == 0:
            time.sleep(1)  # JAX kills the others when process 0 stops to answer: let them end by themselves
        os._exit(status)  # threads may wait in a collective that will never end

    def wait_if_leaving(self) -> None:
        """Leaves the last word to the thread that has seen another process go, and with it the end of this one."""
        if self._leaving:
            self._thread.join()

    def part(self) -> None:
        """Waits until every process has come to the end, and disconnects."""
        self._tell(GOODBYE)
        self._thread.join()
        jax.distributed.shutdown()

    def _accept(self, server: socket.socket, token: str) -> None:
        server.settimeout(PATIENCE)
        while len(self._peers) < self._count - 1:
            peer, _ = server.accept()
            peer.settimeout(GREETING)
            try:
                with peer.makefile('rb') as file:
                    hello = json.loads(file.readline(1000))
            except (OSError, ValueError):
                hello = None
            if isinstance(hello, dict) and hello.get('token') == token:  # anything else came from a stranger
                self._peers[hello['process']], self._hosts[hello['process']] = peer, hello['host']
            else:
                peer.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    said = _receive(key.fileobj)
                    if self._leaving:
                        return  # this process has said why, and who hears it breaks off
                    if said == GOODBYE:
                        selector.unregister(key.fileobj)
                    else:
                        self._lose(key.data if said is None else said)

    def _lose(self, process: int) -> NoReturn:
        host = f' on {self._hosts[process]}' if process in self._hosts else ''
        print(
            f'process {self.own}: error: process {process} of {self._count}{host} is gone, so this one leaves too; '
            'start all of them again to go on from the newest checkpoint',
            file=sys.stderr,
            flush=True,
        )
        self.leave(process, LOST)

    def _tell(self, number: int) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it is gone, which its own silence says
                peer.sendall(struct.pack('<i', number))


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(('', 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(('', 0))


def _keep_alive(peer: socket.socket) -> None:
    """Makes the connection break within half a minute when the other host vanishes without a word."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _receive(peer: socket.socket) -> int | None:
    try:
        data = peer.recv(4, socket.MSG_WAITALL)
    except OSError:
        return None
    return struct.unpack('<i', data)[0] if len(data) == 4 else None
