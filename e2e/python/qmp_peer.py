"""Speaks QMP to a VMM with the qemu.qmp package, which this project has no part in.

Usage: qmp_peer.py SOCKET. Prints one line a check and exits non-zero at the first that fails.
"""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


def check(what, holds, seen=""):
    print(f"{'ok' if holds else 'FAILED'}: {what} {seen}")
    if not holds:
        sys.exit(1)


async def refused(client, command, arguments, error_class):
    try:
        answer = await client.execute(command, arguments)
    except ExecuteError as error:
        check(f"{command} {arguments} is refused", error.error_class == error_class, error.error_class)
    else:
        check(f"{command} {arguments} is refused", False, answer)


async def main(path):
    client = QMPClient("peer")
    await client.connect(path)
    version = await client.execute("query-version")
    check("query-version", isinstance(version["qemu"]["major"], int), version)
    names = {command["name"] for command in await client.execute("query-commands")}
    wanted = {"query-status", "stop", "cont", "migrate", "query-migrate", "query-cpus-fast", "query-block",
              "query-kvm", "query-chardev", "query-name", "query-uuid", "query-pci", "quit",
              "human-monitor-command", "system_powerdown", "system_reset", "migrate_cancel",
              "migrate-set-parameters", "query-migrate-parameters", "query-migrate-capabilities"}
    check("query-commands", wanted <= names, wanted - names)
    check("query-status", (await client.execute("query-status"))["status"] == "running")
    check("query-kvm", (await client.execute("query-kvm"))["enabled"])
    with client.listener() as events:
        await client.execute("stop")
        event = await asyncio.wait_for(events.get(), 10)
        check("event STOP", event["event"] == "STOP" and event["timestamp"]["seconds"] > 0, event)
        check("paused", (await client.execute("query-status"))["status"] == "paused")
        await client.execute("cont")
        event = await asyncio.wait_for(events.get(), 10)
        check("event RESUME", event["event"] == "RESUME", event)
    await refused(client, "no-such-command", {}, "CommandNotFound")
    await refused(client, "migrate", {"uri": 5}, "GenericError")
    await refused(client, "query-status", {"surplus": 1}, "GenericError")
    hmp = await client.execute("human-monitor-command", {"command-line": "info status"})
    check("info status", "running" in hmp, repr(hmp))
    await client.disconnect()
    again = QMPClient("second")
    await again.connect(path)
    check("a second client after the first", (await again.execute("query-name")) is not None)
    await again.disconnect()


asyncio.run(asyncio.wait_for(main(sys.argv[1]), 60))
