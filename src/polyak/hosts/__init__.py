"""Hosts: whose training loop calls. One file each, independent of each other; none decides when to average."""
