"""The command line: from a YAML file and arguments to validated configs."""
