"""Stands in for mosaicml-cli, which Composer imports. Where it is on the path, so is all else that Composer needs."""
