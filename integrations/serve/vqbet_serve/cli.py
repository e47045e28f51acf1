"""The command `vqbet-serve`."""

import asyncio
import logging
import ssl
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from vqbet_edge import EdgePolicy, UsageError, cli
from vqbet_edge.runtime.backends import BackendName, create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_serve.keys import Keys
from vqbet_serve.readiness import ReferenceStep
from vqbet_serve.recordings import Recordings
from vqbet_serve.server import DEFAULT_WAIT_MS, PolicyServer, ServeConfig, run_until_stopped

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a server of this computer and a fleet have in common."""

    # The bundle: a directory (in a fleet the same on every node) or a Hub id (user/name,
    # user/name@revision).
    bundle: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BUNDLE")]
    # Address to listen on; any but loopback needs a key.
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    # Port to listen on.
    port: int = 8000
    # File with the keys that clients must send: a line for each, KEY or NAME KEY. It may change.
    api_key_file: Path | None = None
    # Robots at the same time; each has a window, a history and a thread.
    max_robots: int = 16
    # Seconds without a request after which a robot's place may be given to another one.
    idle_s: float = 30.0
    # Milliseconds that a robot waits for others, to share a run of the transformer; 0 shares none.
    batch_wait_ms: float = DEFAULT_WAIT_MS
    # Start of the random sequence of robots without a session_id.
    seed: int = 0
    # Who runs the graphs.
    backend: BackendName = "auto"

    def config(self, tls: ssl.SSLContext | None = None) -> ServeConfig:
        """Of connections; the key file is read where that is asked."""
        return ServeConfig(
            host=self.host,
            port=self.port,
            keys=None if self.api_key_file is None else Keys.read(self.api_key_file),
            tls=tls,
            seed=self.seed,
            max_robots=self.max_robots,
            idle_s=self.idle_s,
            batch_wait_s=self.batch_wait_ms / 1e3,
        )


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """Drive robots over the network with a bundle (openpi's websocket protocol)."""

    # Backends of which it must be one: auto takes the first of them that is there.
    require: Annotated[tuple[BackendName, ...], tyro.conf.arg(metavar="BACKEND ...")] = ()
    # Seconds that one robot's prediction may take, measured at the start; slower is refused.
    predict_within_s: float | None = None
    # Certificate and private key, for wss://.
    tls_cert: Path | None = None
    tls_key: Path | None = None
    # Folder to record every session to: what its robot saw and what was decided.
    record: Path | None = None
    # Of all recordings together, ended ones included; the oldest make room.
    record_megabytes: int = 10240


def main() -> None:
    """Entry point."""
    cli.run(_main)


def _main() -> None:
    arguments = cli.parse(Arguments, "vqbet-serve")
    config = arguments.config(_tls(arguments))
    if arguments.record is not None:
        most = arguments.record_megabytes << 20
        config = replace(
            config, recordings=Recordings(arguments.record, most, arguments.max_robots)
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if config.keys is not None and config.tls is None:
        _LOG.warning("without --tls-cert, the key and the images can be read on the way")
    bundle = Bundle.open(arguments.bundle)
    backend = create_backend(arguments.backend, bundle, require=arguments.require)
    policy = EdgePolicy(bundle, backend)
    check = ReferenceStep(policy, bundle)
    del bundle  # the graphs' bytes are as large as the weights
    with closing(backend), policy:
        if arguments.predict_within_s is not None:
            policy.check_prediction_time(arguments.predict_within_s)
        asyncio.run(run_until_stopped(PolicyServer(policy, config, backend, check)))


def _tls(arguments: Arguments) -> ssl.SSLContext | None:
    match arguments.tls_cert, arguments.tls_key:
        case None, None:
            return None
        case Path() as certificate, Path() as key:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            return context
        case _:
            raise UsageError("--tls-cert and --tls-key belong together; pass both")
