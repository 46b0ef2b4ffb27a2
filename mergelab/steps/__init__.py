"""The steps that come with mergelab, one a file; `mergelab.jobs` knows them."""
