"""Integrations: one file or folder per framework, independent of each other. None decides when to average."""
