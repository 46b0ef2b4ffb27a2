"""The kinds of evaluation that come with mergelab; each module registers one."""
