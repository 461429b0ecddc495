"""JSON lines as rows whose mistakes are told with the file and the line number."""

import json
import pathlib
from typing import Any

from spo_jax.errors import UserError


class Row:
  """One JSON object of a file, read field by field."""

  def __init__(self, fields: dict[str, Any], place: str):
    self._fields = fields
    self._place = place

  def text(self, name: str, *, may_be_empty: bool = False) -> str:
    """A field that must be there; a number is given as text.

    Raises:
      UserError: if it is missing, empty where it may not be, or neither text nor number.
    """
    if name not in self._fields:
      raise self.error(f"has no field '{name}', it has: {', '.join(self._fields)}")
    value = self.optional(name)
    if not value.strip() and not may_be_empty:
      raise self.error(f"has nothing in field '{name}'")
    return value

  def optional(self, name: str) -> str:
    """A field that may be missing or null: "" then.

    Raises:
      UserError: if it is neither text nor number, or no valid Unicode.
    """
    value = self._fields.get(name)
    if value is None:
      return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
      raise self.error(f"holds {type(value).__name__} in field '{name}', not text or a number")
    text = str(value)
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise self.error(f"holds half of a surrogate pair in field '{name}'") from error
    return text

  def error(self, what: str) -> UserError:
    """The mistake with its place."""
    return UserError(f"{self._place} {what}")


def read_rows(path: pathlib.Path) -> list[Row]:
  """Rows of a file, one a line; blank lines are passed over.

  Raises:
    UserError: with file and line, if a line is no JSON object; or if the file has no rows.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"'{path}' cannot be read as text: {error}") from error
  rows = []
  # Not splitlines: it also breaks at characters that JSON allows inside a text, such as U+2028.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    place = f"{path}:{number}"
    try:
      fields = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
      raise UserError(f"{place} is no JSON: {error}") from error
    if not isinstance(fields, dict):
      raise UserError(f"{place} is no JSON object")
    rows.append(Row(fields, place))
  if not rows:
    raise UserError(f"'{path}' has no rows")
  return rows
