"""The report's rollout trees: every segment with its text, value and advantage."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Steps of the colour scale on either side of zero.
LEVELS = 4
# Subtrees are folded where the tree has more segments than this.
FOLD_ABOVE = 48
# Deeper branching than this is indented instead of laid out in columns.
MAX_COLUMNS = 4
MAX_PROMPT = 20_000


class Tree(NamedTuple):
  """A rollout made ready for drawing.

  Attributes:
    rollout: The JSON object.
    children: Node numbers of the trained children of each node.
    probes: Node numbers of the Monte Carlo probes at each node.
    scale: Advantage that gets the strongest colour.
    limit: Tokens drawn of a segment.
    fold: Whether subtrees but the first are folded.
  """

  rollout: Mapping[str, Any]
  children: Sequence[Sequence[int]]
  probes: Sequence[Sequence[int]]
  scale: float
  limit: int
  fold: bool

  def node(self, i: int) -> Mapping[str, Any]:
    """Node number `i`."""
    return self.rollout["nodes"][i]


def advantage_scale(rollouts: Sequence[Mapping[str, Any]]) -> float:
  """The largest advantage, in absolute value, of several rollouts."""
  values = [abs(node.get("advantage") or 0.0) for rollout in rollouts for node in rollout["nodes"]]
  return max(values, default=0.0) or 1.0


def token_limit(lengths: Sequence[int], budget: int) -> int:
  """The largest number of tokens a segment at which all of them stay within the budget."""
  limit = max(lengths, default=1)
  while limit > 8 and sum(min(length, limit) for length in lengths) > budget:
    limit = max(8, limit * 4 // 5)
  return limit


def make_tree(rollout: Mapping[str, Any], scale: float, budget: int) -> Tree:
  """Sorts the nodes of a rollout.

  Args:
    rollout: The JSON object of a file in `rollouts/`.
    scale: Advantage that gets the strongest colour.
    budget: Tokens to be drawn at most, about.

  Returns:
    The tree.
  """
  nodes = rollout["nodes"]
  children: list[list[int]] = [[] for _ in nodes]
  probes: list[list[int]] = [[] for _ in nodes]
  for i, node in enumerate(nodes):
    if node["parent"] >= 0:
      (probes if node.get("probe") else children)[node["parent"]].append(i)
  limit = token_limit([len(node["tokens"]) for node in nodes[1:]], budget)
  trained = sum(map(len, children))
  return Tree(rollout, children, probes, scale, limit, trained > FOLD_ABOVE)


def advantage_class(advantage: float | None, scale: float) -> str:
  """Colour class: a-none, a-n4 ... a-n1, a-0, a-p1 ... a-p4."""
  if advantage is None:
    return "a-none"
  if not advantage:
    return "a-0"
  level = min(LEVELS, 1 + int(LEVELS * 0.999 * abs(advantage) / scale))
  return f"a-{'p' if advantage > 0 else 'n'}{level}"


def _number(value: float, sign: str = "") -> str:
  """Number with two decimals and, for `sign` "+", its sign; a true minus, and no signed zero."""
  return f"{value:{sign if value else ''}.2f}".replace("-", "−")


def _escape(token: str) -> str:
  return html.escape(token, quote=False).replace("\n", '<i class="nl"></i>\n')


def _tokens(node: Mapping[str, Any], tree: Tree) -> str:
  """The text of a segment, its uncertain tokens marked."""
  threshold = tree.rollout.get("threshold")
  tokens = node["tokens"]
  probs = [] if threshold is None else node.get("probs") or []
  head = len(tokens) if len(tokens) <= tree.limit else tree.limit // 2
  tail = max(head, len(tokens) - (tree.limit - head))
  parts = []
  for i, token in enumerate(tokens):
    if head <= i < tail:
      if i == head:
        parts.append(f'<span class="cut">… {tail - head} tokens …</span>')
      continue
    prob = probs[i] if i < len(probs) else None
    if prob is not None and prob < threshold:
      # A line under the space before a word looks like another character.
      word = token.lstrip(" ") or token
      space = token[: len(token) - len(word)]
      parts.append(f'{space}<u title="{prob:.3g}">{_escape(word)}</u>')
    else:
      parts.append(_escape(token))
  return "".join(parts) or '<span class="cut">(no tokens)</span>'


def _value_chip(value: float | None) -> str:
  if value is None:
    return ""
  share = f' style="--v:{round(100 * value)}%"' if 0 <= value <= 1 else ""
  return f'<span class="v"{share} title="value">V {_number(value)}</span>'


def _is_right(reward: float) -> bool:
  return reward >= 0.5


def _end_chips(node: Mapping[str, Any], leaf: bool) -> str:
  """How a segment ended, and its reward."""
  reward = node.get("reward")
  chips = ""
  if node.get("finished"):
    chips += '<span class="end" title="ended by itself">■ end</span>'
  elif leaf:
    chips += '<span class="out" title="hit the length budget">✂ budget</span>'
  if reward is not None:
    right = _is_right(reward)
    chips += (
      f'<span class="{"ok" if right else "no"}" title="reward {reward:g}">'
      f"{'✓' if right else '✗'} {reward:g}</span>"
    )
  return chips


def _segment(i: int, tree: Tree) -> str:
  """The box of one segment, with its probes."""
  node = tree.node(i)
  advantage = node.get("advantage")
  chips = _value_chip(node.get("value"))
  if advantage is not None:
    chips += f'<span class="a" title="advantage">A {_number(advantage, "+")}</span>'
  leaf = not tree.children[i]
  chips += _end_chips(node, leaf)
  ended = "done" if node.get("finished") else "over" if leaf else "open"
  return (
    f'<div class="seg {ended} {advantage_class(advantage, tree.scale)}">'
    f'<div class="txt">{_tokens(node, tree)}</div><div class="meta">{chips}</div>'
    f"{_probes(i, tree)}</div>"
  )


def _probes(i: int, tree: Tree) -> str:
  """The Monte Carlo probes at node `i`, folded."""
  probes = tree.probes[i]
  if not probes:
    return ""
  rewards = [tree.node(p).get("reward") for p in probes]
  right = sum(reward is not None and _is_right(reward) for reward in rewards)
  items = "".join(
    f'<li><span class="txt">{_tokens(tree.node(p), tree)}</span> '
    f"{_end_chips(tree.node(p), leaf=True)}</li>"
    for p in probes
  )
  plural = "" if len(probes) == 1 else "s"
  return (
    f'<details class="probes"><summary>{len(probes)} probe{plural}, {right} right</summary>'
    f"<ul>{items}</ul></details>"
  )


def _leaves(i: int, tree: Tree) -> list[int]:
  """The trained leaves under node `i`."""
  found, open_nodes = [], [i]
  while open_nodes:
    i = open_nodes.pop()
    open_nodes += tree.children[i]
    if not tree.children[i]:
      found.append(i)
  return found


def _strand(i: int, tree: Tree, unfolded: bool) -> str:
  """A segment and, while there is only one way on, those that follow it; then the branches."""
  path = [i]
  while len(tree.children[path[-1]]) == 1:
    path.append(tree.children[path[-1]][0])
  boxes = "".join(_segment(j, tree) for j in path)
  if tree.fold and len(path) > 3:
    end = _end_chips(tree.node(path[-1]), leaf=not tree.children[path[-1]])
    boxes = (
      f'<details class="strand"{" open" if unfolded else ""}>'
      f"<summary>{len(path)} segments{end}</summary>{boxes}</details>"
    )
  return (
    f'<div class="node"><div class="path">{boxes}</div>{_branches(path[-1], tree, unfolded)}</div>'
  )


def _branches(i: int, tree: Tree, unfolded: bool) -> str:
  children = tree.children[i]
  if not children:
    return ""
  body = "".join(_strand(j, tree, unfolded and j == children[0]) for j in children)
  body = f'<div class="kids">{body}</div>'
  if i == 0 or not tree.fold:
    return body
  leaves = _leaves(i, tree)
  right = sum(_is_right(tree.node(j).get("reward") or 0.0) for j in leaves)
  return (
    f'<details class="fold"{" open" if unfolded else ""}><summary>{len(children)} branches, '
    f"{right} of {len(leaves)} answers right</summary>{body}</details>"
  )


def _columns(tree: Tree) -> int:
  """The largest number of strands one behind the other."""
  deepest = 0
  open_nodes = [(i, 1) for i in tree.children[0]]
  while open_nodes:
    i, depth = open_nodes.pop()
    deepest = max(deepest, depth)
    children = tree.children[i]
    open_nodes += [(j, depth + (len(children) > 1)) for j in children]
  return deepest


def render(tree: Tree) -> str:
  """HTML of one rollout: the prompt, and the tree of segments under it."""
  rollout = tree.rollout
  leaves = [leaf for leaf in _leaves(0, tree) if leaf]
  right = sum(_is_right(tree.node(j).get("reward") or 0.0) for j in leaves)
  segments = sum(map(len, tree.children))
  tokens = sum(len(node["tokens"]) for node in rollout["nodes"][1:] if not node.get("probe"))
  probes = sum(map(len, tree.probes))
  facts = [f"{segments} segments", f"{tokens} tokens", f"{right} of {len(leaves)} answers right"]
  facts += [f"{probes} probes"] if probes else []
  columns = _columns(tree)
  wide = 1 < columns <= MAX_COLUMNS
  prompt = rollout["prompt"]
  if len(prompt) > MAX_PROMPT:
    prompt = f"{prompt[:MAX_PROMPT]}…"
  return (
    f'<p class="facts">{"<span>·</span>".join(facts)}</p>'
    f'<div class="prompt"><div class="tag">prompt</div><div class="txt">{_escape(prompt)}</div>'
    f'<div class="meta">{_value_chip(tree.node(0).get("value"))}'
    f'<span class="answer">answer <b>{html.escape(str(rollout["answer"]))}</b></span></div>'
    f"{_probes(0, tree)}</div>"
    f'<div class="tree{" wide-tree" if wide else ""}" style="--n:{columns}">'
    f"{_branches(0, tree, unfolded=True)}</div>"
  )


def legend(scale: float, threshold: float) -> str:
  """The colour scale of the advantages and the other marks."""
  steps = [f"n{level}" for level in range(LEVELS, 0, -1)] + ["0"]
  steps += [f"p{level}" for level in range(1, LEVELS + 1)]
  cells = "".join(f'<i class="a-{step}"></i>' for step in steps)
  return (
    '<div class="key-row">'
    f'<span class="scale">advantage {_number(-scale)} <span class="cells">{cells}</span> '
    f"{_number(scale, '+')}</span>"
    f'<span><u title="probability 0.42">token</u> less certain than {threshold:g}</span>'
    '<span><span class="end">■ end</span> finished</span>'
    '<span><span class="out">✂ budget</span> cut off</span>'
    '<span><span class="ok">✓</span> <span class="no">✗</span> reward</span>'
    "</div>"
  )
