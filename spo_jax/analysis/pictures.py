"""Pictures of what the instrument found; they need matplotlib."""


def draw(folder, run, bench, drawn, aligned) -> None:
  """Draws the pictures."""
