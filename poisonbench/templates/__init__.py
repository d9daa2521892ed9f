"""Files that `poisonbench new` starts from. They are checked and tested like all others."""
