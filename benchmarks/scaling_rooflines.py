"""How long SPO-tree takes on chips that are not there: rooflines of its phases, in plain Python.

A phase is as long as the longer of its FLOPs at the chip's rate and its bytes at its memory's; both
are divided by the share of the roofline that was measured somewhere, or by 1. What chips send one
another is added to decode, whose steps wait for it, and hidden behind training where it is shorter.
"""

import dataclasses
import math

from spo_jax.models.decoder import DecoderConfig

NUMBER = 2  # bytes, of bfloat16
FLOAT = 4  # bytes, of float32
FORWARD, TRAIN = 2, 8  # FLOPs a weight and token; a block is computed anew in the backward pass
ADAM = 7 * FLOAT  # bytes a parameter: it, its gradient and two moments are read, three written

# Of a decode step, as compiled for v5e:4x4: a gather, and a ring of permutes taken for one.
COLLECTIVES_A_LAYER = 2


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks, and assumptions."""

  flops: float  # a second, dense bfloat16
  memory_rate: float  # bytes a second
  link_rate: float  # bytes a second that a chip receives from others
  memory: float  # bytes
  hop_s: float  # seconds until the first byte has come to a neighbour
  dimensions: int  # of the grid of chips; 0: all lie behind a switch, a hop apart
  prices: tuple[float, float]  # dollars an hour, least and most


@dataclasses.dataclass(frozen=True)
class Machine:
  """Chips in a mesh of data x fsdp: rows are split over both, parameters over `fsdp` alone."""

  name: str
  chip: Chip
  chips: int
  fsdp: int

  @property
  def hops(self) -> float:
    """To the farthest of `fsdp` chips that lie in a square or cube whose links go around."""
    sides = self.chip.dimensions
    return sides / 2 * self.fsdp ** (1 / sides) if sides else 1


@dataclasses.dataclass(frozen=True)
class Policy:
  """What a decoder of a geometry has to multiply and to keep."""

  geometry: DecoderConfig

  @property
  def attention_weights(self) -> int:
    """Numbers in the attention's matrices of all layers."""
    c = self.geometry
    return 2 * c.layers * c.width * c.head_dim * (c.heads + c.kv_heads)

  @property
  def spread_weights(self) -> int:
    """Numbers in the other matrices that are multiplied: feed-forward and unembedding."""
    c = self.geometry
    return c.layers * 3 * c.width * c.ffn + c.width * c.vocab_size

  @property
  def weights(self) -> int:
    """Numbers in all matrices that are multiplied."""
    return self.attention_weights + self.spread_weights

  @property
  def parameters(self) -> int:
    """The weights and the embedding; vectors are left out."""
    c = self.geometry
    return self.weights + c.width * c.vocab_size

  @property
  def token_bytes(self) -> int:
    """Keys and values of a token."""
    c = self.geometry
    return 2 * c.layers * c.kv_heads * c.head_dim * NUMBER

  @property
  def score_flops(self) -> int:
    """FLOPs of a query with a key and its value, in all layers."""
    c = self.geometry
    return 4 * c.layers * c.heads * c.head_dim


@dataclasses.dataclass(frozen=True)
class Work:
  """An iteration of SPO-tree, whose responses are all as long as may be."""

  prompts: int
  prompt_tokens: int
  branches: tuple[int, ...]
  segments: tuple[int, ...]
  updates: int
  slots: int  # most groups that are decoded at a time
  row_length: int
  row_tokens: float  # tokens of packed rows, padding and copies included, for a token of the trees

  def levels(self) -> list[tuple[int, int, int, int]]:
    """By level: groups, continuations of one, tokens of its prefix, tokens of its segments."""
    return [
      (
        self.prompts * math.prod(self.branches[:i]),
        n,
        self.prompt_tokens + sum(self.segments[:i]),
        self.segments[i],
      )
      for i, n in enumerate(self.branches)
    ]

  @property
  def sampled(self) -> int:
    """Tokens drawn."""
    return sum(groups * n * budget for groups, n, _, budget in self.levels())

  @property
  def tokens(self) -> int:
    """Tokens of the trees, prompts included."""
    return self.sampled + self.prompts * self.prompt_tokens

  @property
  def steps(self) -> int:
    """Decode steps, one after the other."""
    return sum(-(-groups // self.slots) * budget for groups, _, _, budget in self.levels())

  @property
  def mean_context(self) -> float:
    """Tokens that a drawn token sees on the mean."""
    seen = sum(g * n * s * (prefix + (s + 1) / 2) for g, n, prefix, s in self.levels())
    return seen / self.sampled


@dataclasses.dataclass(frozen=True)
class Shares:
  """Of its roofline that a phase reaches."""

  decode: float = 1.0
  forward: float = 1.0
  train: float = 1.0


@dataclasses.dataclass(frozen=True)
class Limits:
  """What may lie on a chip."""

  state: float  # share of its memory
  caches: float  # share of what the state and the weights of decode leave


def on_chip(chip: Chip, flops: float, accessed: float) -> float:
  """Seconds of a chip's own work."""
  return max(flops / chip.flops, accessed / chip.memory_rate)


def step_parts(
  model: Policy, machine: Machine, groups: int, n: int, prefix: float, suffix: float
) -> dict[str, float]:
  """Seconds of a decode step's parts, each at its roofline.

  Of the weights of `fsdp` chips those of the attention are whole on each while it decodes; the
  others are split along what they give, and rows are sent there and back.

  Args:
    model: the policy.
    machine: the chips.
    groups: of all chips, that are decoded together; each chip has as many as the busiest.
    n: continuations of a group.
    prefix: tokens that all of a group see.
    suffix: tokens of its own that a continuation sees.
  """
  chip, fsdp = machine.chip, machine.fsdp
  mine = -(-groups // machine.chips)
  rows = mine * n
  cached = lambda queries, keys: on_chip(
    chip, queries * model.score_flops, keys * model.token_bytes
  )
  # Rows go to the feed-forward's weights and back, once to the unembedding's, and are an all-reduce
  # of what the parts of the embedding have.
  sent = (2 * model.geometry.layers + 3) * rows * (fsdp - 1) * model.geometry.width * NUMBER
  sent += rows * model.geometry.vocab_size * FLOAT * (fsdp - 1) / fsdp
  waits = model.geometry.layers * COLLECTIVES_A_LAYER * machine.hops * chip.hop_s
  return {
    "weights": on_chip(chip, FORWARD * rows * model.weights, decode_weights_bytes(model, machine)),
    "prefix": cached(rows * prefix, mine * prefix),
    "suffix": cached(rows * suffix, rows * suffix),
    "logits": on_chip(chip, 0, 2 * rows * model.geometry.vocab_size * FLOAT),
    "sent": sent / chip.link_rate,
    "waits": waits if fsdp > 1 else 0.0,
  }


def decode_seconds(model: Policy, machine: Machine, work: Work, shares: Shares) -> float:
  """Seconds to draw an iteration's segments."""
  total = 0.0
  for groups, n, prefix, budget in work.levels():
    waves = -(-groups // work.slots)
    at_once = -(-groups // waves)
    for token in range(budget):
      parts = step_parts(model, machine, at_once, n, prefix, token + 1)
      waiting = parts.pop("sent") + parts.pop("waits")
      total += waves * (sum(parts.values()) / shares.decode + waiting)
  return total


def prefill_seconds(model: Policy, machine: Machine, work: Work, shares: Shares) -> float:
  """Seconds to run the prompts once; a chip runs whole prompts."""
  tokens = -(-work.prompts // machine.chips) * work.prompt_tokens
  flops = tokens * FORWARD * model.weights
  return on_chip(machine.chip, flops, model.weights * NUMBER) / shares.forward


def pass_seconds(
  model: Policy, machine: Machine, work: Work, share: float, flops: int, rows: float
) -> float:
  """Seconds to take rows through the model, a row at a time on each chip.

  Args:
    model: the policy.
    machine: the chips.
    work: what is packed.
    share: of the roofline that is reached.
    flops: a weight and token.
    rows: of all chips; where chips do not divide them, some chips have one more.
  """
  turns = math.ceil(rows / machine.chips)
  attention = work.mean_context * model.score_flops * flops / FORWARD
  own = work.row_length * (flops * model.weights + attention) / machine.chip.flops / share
  # Weights come from the other chips of `fsdp`, backward once more; sums of gradients in float32 go
  # there, and around all that hold the same part.
  fsdp, copies = machine.fsdp, machine.chips // machine.fsdp
  sent = (fsdp - 1) / fsdp * (NUMBER if flops == FORWARD else 2 * NUMBER + FLOAT)
  if flops != FORWARD:
    sent += 2 * (copies - 1) / copies * FLOAT / fsdp
  return turns * max(own, model.parameters * sent / machine.chip.link_rate)


def reference_seconds(model: Policy, machine: Machine, work: Work, shares: Shares) -> float:
  """Seconds of the reference policy's log-probs of the packed rows."""
  rows = work.tokens * work.row_tokens / work.row_length
  return pass_seconds(model, machine, work, shares.forward, FORWARD, rows)


def update_seconds(model: Policy, machine: Machine, work: Work, shares: Shares) -> float:
  """Seconds of an iteration's updates."""
  rows = work.tokens * work.row_tokens / work.row_length / work.updates
  one = pass_seconds(model, machine, work, shares.train, TRAIN, rows)
  adam = model.parameters * ADAM / machine.fsdp / machine.chip.memory_rate
  return work.updates * (one + adam)


def phases(model: Policy, machine: Machine, work: Work, shares: Shares) -> dict[str, float]:
  """Seconds of the phases of an iteration."""
  return {
    "prefill": prefill_seconds(model, machine, work, shares),
    "decode": decode_seconds(model, machine, work, shares),
    "reference": reference_seconds(model, machine, work, shares),
    "updates": update_seconds(model, machine, work, shares),
  }


def state_bytes(model: Policy, machine: Machine) -> float:
  """Parameters, two moments and the reference policy of a chip, in float32."""
  return 4 * FLOAT * model.parameters / machine.fsdp


def decode_weights_bytes(model: Policy, machine: Machine) -> float:
  """The weights of a chip while it decodes."""
  return (model.attention_weights + model.spread_weights / machine.fsdp) * NUMBER


def most_slots(model: Policy, machine: Machine, work: Work, share: float) -> int:
  """Groups of the last level whose caches a share of what the state and the weights of decode leave
  holds at a time.

  A group has its prefix twice, where it was made and where it is decoded.
  """
  groups, n, prefix, budget = work.levels()[-1]
  of_group = (2 * prefix + n * budget) * model.token_bytes
  held = state_bytes(model, machine) + decode_weights_bytes(model, machine)
  room = share * (machine.chip.memory - held)
  return min(groups, max(0, math.floor(room / of_group)) * machine.chips)


def suited(
  model: Policy,
  machine: Machine,
  work: Work,
  shares: Shares,
  limits: Limits,
  packed: dict[int, float],
) -> tuple[Machine, Work]:
  """The mesh, slots and length of rows with which an iteration is shortest.

  A large `fsdp` leaves room for caches, a small one sends less. Short rows hold more copies of a
  token, few long ones leave chips idle.

  Args:
    model: the policy.
    machine: the chips, in any mesh.
    work: an iteration, with any slots and rows.
    shares: that are reached.
    limits: of memory.
    packed: `row_tokens` by `row_length`.
  """
  found = []
  for fsdp in (2**k for k in range(machine.chips.bit_length())):
    mesh = dataclasses.replace(machine, fsdp=fsdp)
    slots = most_slots(model, mesh, work, limits.caches)
    state_fits = state_bytes(model, mesh) <= limits.state * mesh.chip.memory
    if slots and state_fits and machine.chips % fsdp == 0:
      rows = [
        dataclasses.replace(work, slots=slots, row_length=length, row_tokens=tokens)
        for length, tokens in packed.items()
      ]
      best = min(rows, key=lambda work: update_seconds(model, mesh, work, shares))
      found.append((mesh, best))
  return min(found, key=lambda pair: sum(phases(model, *pair, shares).values()))
