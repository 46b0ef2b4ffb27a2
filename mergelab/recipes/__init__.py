"""What a merge is made of: the recipe as mergekit YAML, checked and turned into a plan of tensors."""
