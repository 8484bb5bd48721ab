from lorasmith.cli.main import main

main()
