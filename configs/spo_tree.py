"""x"""
from spo_jax.config import default_config, parse_variant
def get_config(variant=None):
  config = default_config()
  name = parse_variant(variant, {"arithmetic": 1, "filler": 1}, "arithmetic")
  return config
