"""What a server withstands: many clients, clients that go, clients that mean harm, and its own end."""
