"""Errors that the command line shows to a person."""

USER_ERROR_STATUS = 2  # exit status of a command after a mistake of the user's


class UserError(Exception):
  """A mistake that a user can fix: printed as one line, exit status 2."""


class Stopped(Exception):
  """A run that was asked to end and has saved: printed as one line, `stopping.STOPPED_STATUS`."""
