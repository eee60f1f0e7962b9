"""What can go wrong with an emulated network."""


class TopologyError(Exception):
    """The network could not be built, or is not what was asked for. The message says which."""
