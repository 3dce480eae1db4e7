"""Run where Ray is: `python ray_two_nodes.py BUNDLE IMAGES OUT`. Two local nodes, one of which is killed on the way."""

import os
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
from ray.cluster_utils import Cluster

from dinoexport.embed import run

bundle, images, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)


def kill() -> None:
    while len(list(Path(out).glob("*.parquet"))) < 2:
        time.sleep(0.05)
    cluster.remove_node(second, allow_graceful=False)
    print("killed a node with", len(list(Path(out).glob("*.parquet"))), "parts there", flush=True)


threading.Thread(target=kill, daemon=True).start()
found = run.embed(Path(bundle), images, out, shards=24, engine="ray", max_failed=0.2, workers=2)
print("rows", found.rows, "complete", found.complete, flush=True)
ray.shutdown()
cluster.shutdown()
