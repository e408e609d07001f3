"""The instrument: what a findings text states, and how good drafted findings are beside the reference."""
