"""URLs, hosts and paths that must lead nowhere."""

# Spellings of this machine: short, decimal, octal and hexadecimal forms, IPv4 inside of IPv6, encodings.
LOOPBACK = """
    127.0.0.1 127.1 127.0.1 2130706433 0x7f000001 0x7f.0.0.1 0x7f.1 0177.0.0.1 0177.0.0.01 017700000001 127.0.0.1. 127.0.0.2
    127.127.127.127 localhost LOCALHOST localhost. localhost.localdomain ip6-localhost 0 0.0.0.0 00.0.0.0 [::1] [::]
    [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::7f00:1] [64:ff9b:1::7f00:1] [2002:7f00:1::]
    [2001:0:7f00:1::] [::1%25lo] 127%2e0%2e0%2e1 %31%32%37.0.0.1 127.0.0.1%00.example.com 127.0.0.1%2f@example.com
""".split()
# Letters and digits that some parsers fold into ASCII.
LOOPBACK += [
    "127\u30020\u30020\u30021",
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460",
    "\uff11\uff12\uff17.0.0.1",
    "\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3",
]
# Metadata services, private and special networks.
INTERNAL = """
    169.254.169.254 2852039166 0xa9fea9fe 0xa9.0xfe.0xa9.0xfe 0251.0376.0251.0376 169.254.43518 169.16689662
    [::ffff:169.254.169.254] [::ffff:a9fe:a9fe] [64:ff9b::a9fe:a9fe] [2002:a9fe:a9fe::] [fd00:ec2::254] 100.100.100.200
    metadata.google.internal metadata instance-data 10.0.0.1 10.255.255.255 167772161 172.16.0.1 172.31.255.254 192.168.0.1
    192.168.1.254 100.64.0.1 100.127.255.254 198.18.0.1 198.19.255.254 192.0.0.1 192.0.2.1 198.51.100.1 203.0.113.1 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255 [fc00::1] [fd12:3456::1] [fe80::1] [fec0::1] [ff02::1] [2001:db8::1]
    [::ffff:10.0.0.1] [::ffff:192.168.0.1]
""".split()
HOSTS = LOOPBACK + INTERNAL
SCHEMES = "gopher ftp dict ldap tftp jar netdoc data javascript unix ws file http+unix git ssh s3a ipfs".split()


def urls(port: int, allowed: str) -> list[str]:
    """Every host in several shapes. `port` has the listener, `allowed` is a `host:port` that the operator listed."""
    corpus = []
    for host in HOSTS:
        corpus += [f"http://{host}:{port}/x/m1", f"https://{host}:{port}/x/m1", f"http://{host}/x/m1", f"https://{host}/latest/meta-data"]
        corpus += [
            f"http://{allowed}@{host}:{port}/x/m1",
            f"http://{host}:{port}\\@{allowed}/x/m1",
            f"http://{host}:{port}#@{allowed}/x/m1",
        ]
    for host in ("127.0.0.1", "[::1]", "169.254.169.254", "10.0.0.1"):
        corpus += [
            f"http://{allowed}\\@{host}:{port}/x/m1",
            f"http:\\\\{host}:{port}/x/m1",
            f"http:/{host}:{port}/x/m1",
            f"http:{host}:{port}/x/m1",
            f"//{host}:{port}/x/m1",
            f"http:///{host}:{port}/x/m1",
            f"http://{host}:{port}",
            f"http://{host}:{port}?{allowed}/m1",
            f"http://{allowed}.{host}:{port}/x/m1",
            f"http://{allowed}%00@{host}:{port}/m1",
            f"http://{allowed} @{host}:{port}/m1",
            f"http://{allowed}\t@{host}:{port}/m1",
            f"http://{allowed}\r\nHost: {host}:{port}/m1",
            f"HTTP://{host}:{port}/x/m1",
            f"hTTps://{host}:{port}/x/m1",
            f"http://a:b@{host}:{port}/m1",
            f"http://{host}:0/m1",
            f"http://{host}:65536/m1",
            f"http://{host}:-1/m1",
            f"http://{host}:{port}:80/m1",
            f"http://{host}:22/m1",
            f"http://{host}:6379/m1",
            f"url:http://{host}:{port}/m1",
            f" http://{host}:{port}/m1",
            f"\thttp://{host}:{port}/m1",
            f"http://{host}:{port}/m1 ",
            f"http://{host}:{port}/m1\0",
            f"s3://{host}:{port}/m1",
            f"gs://{host}:{port}/m1",
            f"hf://{host}:{port}/m1",
            f"hf://{host}:{port}",
            f"s3://bucket@{host}:{port}/m1",
        ]
        corpus += [f"{scheme}://{host}:{port}/x/m1" for scheme in SCHEMES]
    return corpus
