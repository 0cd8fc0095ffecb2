"""A Ray cluster of several nodes on this machine, each node processes of its own that can be killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

STORE_BYTES = 80 * 2**20


@contextmanager
def ray_cluster(head_cpus: int, nodes: int = 0) -> Iterator[Any]:
    """A head and so many nodes of one CPU, up before it is yielded and gone afterwards."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": head_cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(nodes):
            join(cluster)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def join(cluster: Any) -> None:
    """One more node of one CPU."""
    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def lose(cluster: Any, node: Any) -> None:
    """A machine that fails takes its workers with it; a raylet alone leaves them some seconds."""
    for child in raylet(node).children(recursive=True):
        child.kill()
    cluster.remove_node(node, allow_graceful=False)
