"""What people see: the terminal, tables, cards."""
