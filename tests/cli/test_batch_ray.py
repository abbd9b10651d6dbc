"""``kvq batch --ray``: requests over two Ray nodes, whose driver, workers and nodes are killed; real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvq.runtime.server.cluster import LOSSES
from tests.tools.batches import assert_answered, lines_of, requests_file
from tests.tools.command_line import assert_one_line_error, kvq
from tests.tools.tree import ROOT

# Ray runs on Windows only in part.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")]

KILLS = int(os.environ.get("KVQ_TEST_KILLS", "4"))
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
START_S = 90


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes on this machine; its processes find the package that is tested."""
    pytest.importorskip("ray")  # the extra `ray`, which `dev` does not bring
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(initialize_head=True, head_node_args=NODE)
        made.add_node(**NODE)
        yield made
        made.shutdown()


def raylets(cluster) -> list[int]:
    """Process ids of the nodes' daemons, whose children the workers are; the head's first."""
    nodes = [cluster.head_node, *cluster.worker_nodes]
    return [node.all_processes["raylet"][0].process.pid for node in nodes]


def workers(cluster) -> dict[int, int]:
    """Process id of the batch's worker of each raylet that has one."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = int(status.read_text().split("PPid:")[1].split()[0])
            name = status.with_name("cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        if parent in raylets(cluster) and name.startswith(b"ray::Worker"):
            found[parent] = int(status.parent.name)
    return found


def wait_for(condition, process) -> None:
    """Until it is true, while the process runs."""
    end = time.monotonic() + START_S
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_both_nodes_answer_and_a_killed_batch_goes_on(cluster, tiny_bundle, tiny_model, tmp_path):
    """The driver is killed at random moments; then a worker, and at last a whole node, while they work."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = requests_file(source, 500)
    arguments = [sys.executable, "-m", "kvq", "batch", "--ray", cluster.address, "-m", str(tiny_bundle)]
    draw = random.Random(7)
    for kill in range(KILLS):
        process = subprocess.Popen([*arguments, "-q", str(source), str(out)])
        until = lines_of(out) + draw.randrange(300 // KILLS)
        wait_for(
            lambda until=until, first=not kill: lines_of(out) >= until and (not first or workers(cluster)), process
        )
        time.sleep(draw.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    before = lines_of(out)
    assert 0 < before < len(prompts)

    process = subprocess.Popen([*arguments, str(source), str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: lines_of(out) > before and len(workers(cluster)) == 2, process)
    os.kill(workers(cluster)[raylets(cluster)[0]], signal.SIGKILL)
    after = lines_of(out)
    wait_for(lambda: lines_of(out) > after, process)
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    said, told = process.communicate()
    assert process.returncode == 0, told
    assert said == b""
    assert told.count(b"is lost") >= 2, told
    assert f"{len(prompts) - before} answered, 0 of them by an error, {before} were there" in told.decode()
    assert_answered(out, prompts, tiny_model)


def test_what_keeps_a_batch_from_a_cluster_is_one_line(cluster, tiny_bundle, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests_file(source, 2)
    assert_one_line_error(kvq("batch", "--ray", "127.0.0.1:9", source, out), "127.0.0.1:9", "ray start --head")
    assert_one_line_error(kvq("batch", "--ray", "local", source, out), "leave --ray out")
    done = kvq("batch", "--ray", cluster.address, "-m", "no-such-model", source, out)
    assert done.returncode == 1
    assert "is left out: no model 'no-such-model'" in done.stderr
    assert "no node of the cluster can answer" in done.stderr.splitlines()[-1]
    assert lines_of(out) == 0
    done = kvq("batch", "--ray", cluster.address, "-m", tiny_bundle, "-p", "int9", source, out)
    assert done.returncode == 1
    assert "int9" in done.stderr


def test_a_node_whose_workers_always_die_is_left_out(cluster, tiny_bundle, tmp_path):
    """As where a model does not fit the memory: the run ends, and says which node and why."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests_file(source, 2)
    arguments = [sys.executable, "-m", "kvq", "batch", "--ray", cluster.address, "-m", str(tiny_bundle)]
    process = subprocess.Popen([*arguments, str(source), str(out)], stderr=subprocess.PIPE)
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        for worker in workers(cluster).values():
            os.kill(worker, signal.SIGKILL)
        time.sleep(0.01)
    told = process.communicate()[1].decode()
    assert process.returncode == 1, told
    assert f"its worker was lost {LOSSES} times without an answer" in told
