"""The merge methods: one row for everything known of each."""
