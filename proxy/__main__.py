"""`python -m proxy` is the command `nearhit`."""

from proxy.cli import main

main()
