// Command gopod is a pod of the original DRSM: the real module, unmodified, obeying lines on standard input.
//
// Each line is a command, and each answer one JSON line on standard output that names its command by number,
// the first line being 1. Commands run side by side: an allocation may take for ever, as the module looks for
// a chunk number that it has never seen. The end of standard input ends the pod, without a word to anybody,
// since the module has none.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/omec-project/util/drsm"
	"github.com/omec-project/util/logger"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	issuedMax = 200_000 // ids of one run
	pace      = 20 * time.Millisecond
)

// fields are what an answer says beside its event and its command.
type fields map[string]any

// speaker writes one JSON line at a time.
type speaker struct {
	mutex   sync.Mutex
	encoder *json.Encoder
}

func (s *speaker) say(event string, command int, said fields) {
	line := fields{"event": event}
	if command > 0 {
		line["command"] = command
	}
	for name, value := range said {
		line[name] = value
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if err := s.encoder.Encode(line); err != nil {
		log.Fatalf("nobody hears this pod any more: %v", err)
	}
}

// owner is whom the module takes for the owner of an id.
type owner struct {
	Name     string `json:"name"`
	IP       string `json:"ip"`
	Instance string `json:"instance"`
}

// pod obeys commands.
type pod struct {
	*speaker
	drsm    drsm.DrsmInterface
	mutex   sync.Mutex
	running chan struct{} // closed by `stop`; nil while nothing runs
}

func main() {
	url := flag.String("url", "", "of MongoDB")
	db := flag.String("db", "", "database")
	pool := flag.String("pool", "amfid", "collection")
	name := flag.String("name", "", "of this pod")
	ip := flag.String("ip", "", "of this pod")
	instance := flag.String("instance", "", "of this pod")
	bits := flag.Int("bits", 24, "of an id")
	demux := flag.Bool("demux", false, "never allocate nor claim")
	callback := flag.String("callback", "none", "what is said of an id in a claimed chunk: none, free or used")
	flag.Parse()
	logToStandardError()

	speaks := &speaker{encoder: json.NewEncoder(os.Stdout)}
	options := &drsm.Options{ResIdSize: int32(*bits), Mode: drsm.ResourceClient}
	if *demux {
		options.Mode = drsm.ResourceDemux
	}
	switch *callback {
	case "none":
	case "free", "used":
		options.ResourceValidCb = func(id int32) bool {
			speaks.say("asked", 0, fields{"id": id})
			return *callback == "free"
		}
	default:
		log.Fatalf("-callback: expected none, free or used, found %q", *callback)
	}
	me := drsm.PodId{PodName: *name, PodIp: *ip, PodInstance: *instance}
	module, err := drsm.InitDRSM(*pool, me, drsm.DbInfo{Url: *url, Name: *db}, options)
	if err != nil {
		log.Fatal(err)
	}
	speaks.say("started", 0, nil)
	obeying := &pod{speaker: speaks, drsm: module}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for number := 1; lines.Scan(); number++ {
		words := strings.Fields(lines.Text())
		if len(words) == 0 || words[0] == "quit" {
			return
		}
		go obeying.obey(number, words[0], words[1:])
	}
}

// logToStandardError keeps standard output, where the module logs by default, for the answers. What it says of
// each chunk stays out: it prints maps there that other goroutines of it write to.
func logToStandardError() {
	config := zap.NewProductionConfig()
	config.Level.SetLevel(zapcore.WarnLevel)
	config.Encoding = "console"
	config.EncoderConfig.EncodeTime = zapcore.ISO8601TimeEncoder
	quiet := zap.Must(config.Build()).Sugar()
	logger.DrsmLog, logger.MongoapiLog, logger.UtilLog = quiet, quiet, quiet
}

func (p *pod) obey(number int, command string, arguments []string) {
	event, said, err := p.answer(command, arguments)
	if err != nil {
		event, said = "failed", fields{"error": err.Error()}
	}
	p.say(event, number, said)
}

func (p *pod) answer(command string, arguments []string) (string, fields, error) {
	if command == "delete-pod" { // the only one whose arguments are no numbers
		instance := strings.Join(arguments, " ")
		p.drsm.DeletePod(instance)
		return "deleted", fields{"instance": instance}, nil
	}
	numbers, err := parsed(arguments)
	if err != nil {
		return "", nil, err
	}
	switch {
	case command == "allocate" && len(numbers) == 1:
		ids, err := p.allocate(int(numbers[0]))
		return "allocated", fields{"ids": ids}, err
	case command == "release":
		for _, id := range numbers {
			if err := p.drsm.ReleaseInt32ID(id); err != nil {
				return "", nil, fmt.Errorf("release %d: %w", id, err)
			}
		}
		return "released", fields{"ids": numbers}, nil
	case command == "owner":
		return "owners", fields{"owners": p.owners(numbers)}, nil
	case command == "run" && len(numbers) == 1:
		return "running", nil, p.run(int(numbers[0]))
	case command == "stop":
		return "stopped", nil, p.stop()
	}
	return "", nil, fmt.Errorf("no such command: %s with %d arguments", command, len(arguments))
}

func parsed(arguments []string) ([]int32, error) {
	numbers := make([]int32, len(arguments))
	for i, argument := range arguments {
		number, err := strconv.ParseInt(argument, 10, 32)
		if err != nil {
			return nil, err
		}
		numbers[i] = int32(number)
	}
	return numbers, nil
}

func (p *pod) allocate(count int) ([]int32, error) {
	ids := make([]int32, 0, count)
	for len(ids) < count {
		id, err := p.drsm.AllocateInt32ID()
		if err != nil {
			return nil, fmt.Errorf("allocate, after %d ids: %w", len(ids), err)
		}
		ids = append(ids, id)
	}
	return ids, nil
}

func (p *pod) owners(ids []int32) []*owner {
	owners := make([]*owner, len(ids))
	for i, id := range ids {
		if found, err := p.drsm.FindOwnerInt32ID(id); err == nil {
			owners[i] = &owner{found.PodName, found.PodIp, found.PodInstance}
		}
	}
	return owners
}

// run allocates so many ids a second until `stop`, and tells of them as they are issued, so that those of a pod
// that is killed are known as well.
func (p *pod) run(rate int) error {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.running != nil {
		return fmt.Errorf("it runs already")
	}
	stopped := make(chan struct{})
	p.running = stopped
	go p.issue(rate, stopped)
	return nil
}

func (p *pod) issue(rate int, stopped <-chan struct{}) {
	ticker := time.NewTicker(pace)
	defer ticker.Stop()
	batch := max(1, rate*int(pace)/int(time.Second))
	for issued := 0; issued < issuedMax; issued += batch {
		select {
		case <-stopped:
			return
		case <-ticker.C:
		}
		ids, err := p.allocate(batch)
		if err != nil {
			p.say("failed", 0, fields{"error": err.Error()})
			return
		}
		p.say("issued", 0, fields{"ids": ids})
	}
}

func (p *pod) stop() error {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	if p.running == nil {
		return fmt.Errorf("nothing runs")
	}
	close(p.running)
	p.running = nil
	return nil
}
