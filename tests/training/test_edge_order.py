"""Segments are packed in the order in which the reference lists a tree's edges."""

import numpy as np

from spo_jax.forest import Forest
from spo_jax.training.packing import PackConfig, pack


def test_edges_are_packed_depth_first_in_sampling_order(fixture_arrays):
  data = fixture_arrays("trees")
  cfg = PackConfig(row_length=640, rows=1, query_block=64, key_block=64)
  for case in data["case_name"]:
    tree = {name: data[f"{case}__{name}"] for name in ("parent", "depth", "leaf", "edge_rank")}
    nodes = np.arange(len(tree["parent"]), dtype=np.int32)
    none = np.zeros(len(nodes), bool)
    forest = Forest(  # a token a node, its number
      tree=np.zeros_like(nodes),
      parent=tree["parent"],
      depth=tree["depth"],
      finished=tree["leaf"],
      probe=none,
      offsets=np.arange(len(nodes) + 1),
      tokens=nodes,
      logprobs=np.zeros(len(nodes), np.float32),
    )
    np.testing.assert_array_equal(forest.leaf, tree["leaf"])
    batch, _ = pack(forest, np.zeros(len(nodes), np.float32), tree["depth"] > 0, cfg)
    packed = batch.tokens[0, 0, : len(nodes)]
    assert tree["edge_rank"][0] == -1 and packed[0] == 0
    np.testing.assert_array_equal(tree["edge_rank"][packed[1:]], nodes[:-1])
