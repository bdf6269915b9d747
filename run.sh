k=200000
while [ $(date +%H%M) -lt 2228 ]; do
  nice -n 19 timeout 600 /usr/bin/python3.11 -m tests.simulation --first $k --seeds 1000 >> /tmp/long.log 2>&1; echo "slice $k exit $? $(date +%T)" >> /tmp/long.log; k=$((k+1000))
done
