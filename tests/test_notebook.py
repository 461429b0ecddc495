"""The notebook runs from the first cell to the last, on the tiny task."""

import shlex

import nbclient
import nbformat

from tests import tiny_run

NOTEBOOK = tiny_run.REPOSITORY / "launch" / "colab.ipynb"


def outputs(cell):
  """What a cell shows: (its data by MIME type, the text that it prints)."""
  data = {}
  for output in cell.outputs:
    data |= output.get("data", {})
  printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
  return data, printed


def test_stored_without_outputs():
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None


def test_runs_from_first_to_last(tmp_path):
  notebook = nbformat.read(NOTEBOOK, as_version=4)
  workdir = tmp_path / "run"
  fields = [word for word in tiny_run.command("spo_tree.py", workdir) if "--config." in word]
  settings = {"WORKDIR": str(workdir), "FIELDS": shlex.join(fields)}
  client = nbclient.NotebookClient(
    notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
  )
  client.execute(env=tiny_run.environment() | settings)
  shown = {cell.id: outputs(cell) for cell in notebook.cells if cell.cell_type == "code"}
  assert shown["install"] == ({}, "")  # everything is there already
  iterations = tiny_run.TINY["iterations"]
  assert f"iter {iterations}/{iterations}" in shown["train"][1]
  assert "image/png" in shown["curves"][0]
  assert "Segment Policy Optimization run" in shown["report"][0]["text/html"]
  assert shown["tree"][1].count("V 0.00") > 2
  answers = shown["ask"][1].splitlines()[-4:]
  assert all(answer.startswith(("right ", "wrong ")) for answer in answers)
