"""The evolution of a merge: the sweeper, its journal, and the candidates it makes."""
