"""The phantom: synthetic chest films with known findings, and a small model of LLaVA-Rad's form that reads them."""
