"""The TFDS builder of every data set here: records that are texts, as array_record files."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class TextBuilder(tfds.core.GeneratorBasedBuilder):
  """Splits of records that are dataclasses of texts.

  Features of a record: `id` (int64, its position in the split), and the fields of `RECORD`. A
  change of what a split holds needs a new VERSION, as what is on disk is not built again.
  """

  RECORD: type
  DESCRIPTION: str
  # No downloads, so no checksums; TFDS needs the package importlib_resources to look for them.
  url_infos = None

  @abc.abstractmethod
  def _make_splits(self) -> Mapping[str, Sequence[Any]]:
    """Records by split; called only when they are not on disk yet."""

  def _info(self):
    features = {"id": np.int64}
    features |= {field.name: tfds.features.Text() for field in dataclasses.fields(self.RECORD)}
    # Shuffling is the reader's business; without it the order on disk is that of generation.
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # What is downloaded, other builders have downloaded.
    return {name: self._generate_examples(split) for name, split in self._make_splits().items()}

  def _generate_examples(self, records):
    for i, record in enumerate(records):
      yield i, {"id": i, **dataclasses.asdict(record)}
